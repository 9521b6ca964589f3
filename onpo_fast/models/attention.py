"""What each token of a packed batch sees, as arguments of a model's forward.

A token sees itself and earlier tokens of its sequence that are of the prompt or of its own response; in a layer with
a sliding window, only those that are less than the window away. The window counts positions, not indices of the row,
because other responses lie between a response and its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig, PreTrainedModel

from ..packing import Packed

FLEX = "flex_attention"
FLEX_COMPILATIONS = 64  # most: for windows, gradients, short rows; those beyond are not fused, without a message
WINDOWS = {"sliding_window", "use_sliding_window"}  # options of a window that is counted as above
LAYER_TYPES = {"full_attention", "sliding_attention"}
# names of options that limit how far attention sees
LIMIT = re.compile(r"(window|attention_chunk)(_size)?$")


def is_flash(attention: str | None) -> bool:
    """Returns whether an attention implementation, by transformers' name, is flash-attention."""
    return "flash" in (attention or "")


def limits_unknown_here(config: PretrainedConfig) -> list[str]:
    """Returns the options and layer types by which a model sees only a part of a row in a way that no mask here has."""
    text = config.get_text_config()
    options = [name for name, value in vars(text).items() if LIMIT.search(name) and value and name not in WINDOWS]
    return sorted(options) + sorted(set(getattr(text, "layer_types", None) or []) - LAYER_TYPES)


def window_of(config: PretrainedConfig) -> int | None:
    """Returns the number of positions that layers with a sliding window see; None without such layers."""
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None)
    if layers and "sliding_attention" not in layers:
        return None
    return getattr(text, "sliding_window", None)


def attention_arguments(model: PreTrainedModel, packed: Packed) -> dict[str, object]:
    """Returns the arguments of the model's forward that say what each token sees, and where it is.

    A mask is (B, 1, L, L): bool under sdpa, numbers that are added to the logits under eager attention, a ``BlockMask``
    under flex_attention. flash-attention takes the boundaries of sequences that are end to end. A model with layers of
    several types takes a mask for each type.
    """
    if packed.layout == "separate":  # not all families take position_ids, and separate rows do not need them
        return {"attention_mask": packed.padding_mask}
    config = model.config.get_text_config()
    if is_flash(config._attn_implementation):
        if packed.layout != "separate_row":
            raise ValueError(f"flash-attention has no mask for the layout {packed.layout}")
        lengths = {"max_length_q": packed.longest, "max_length_k": packed.longest}
        edges = {"cu_seq_lens_q": packed.edges, "cu_seq_lens_k": packed.edges}
        return {"attention_mask": None, "position_ids": packed.position_ids, **edges, **lengths}
    dtype = model.get_input_embeddings().weight.dtype
    mask = full = _mask(packed, None, config._attn_implementation, dtype)
    window = window_of(config)
    if window is not None:
        windowed = full if packed.longest <= window else _mask(packed, window, config._attn_implementation, dtype)
        mask = _by_layer_type(config, full, windowed)
    return {"attention_mask": mask, "position_ids": packed.position_ids}


def cached_attention_arguments(model: PreTrainedModel, positions: Tensor, columns: int) -> dict[str, object]:
    """Returns the arguments that ``attention_arguments`` does, for one more token in each row of a cache.

    A token sees the columns up to its own position, of the window in layers that have one.

    Args:
        positions: (n,) int64, the position of each row's token; earlier tokens are in the columns of their positions.
        columns: number of columns of the cache that attention reads.
    """
    config = model.config.get_text_config()
    dtype = model.get_input_embeddings().weight.dtype
    places, index = positions[:, None, None, None], torch.arange(columns, device=positions.device)
    sees = index <= places
    mask = _as_taken(sees, config._attn_implementation, dtype)
    window = window_of(config)
    if window is not None:
        windowed = _as_taken(sees & (places - index < window), config._attn_implementation, dtype)
        mask = _by_layer_type(config, mask, windowed)
    return {"attention_mask": mask, "position_ids": positions[:, None]}


def _by_layer_type(config: PretrainedConfig, full: object, windowed: object) -> object:
    """Returns the masks of a model with a sliding window: for each type of its layers, or one for all."""
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": windowed}
    return windowed


def _mask(packed: Packed, window: int | None, attention: str, dtype: torch.dtype) -> Tensor | BlockMask:
    """Returns the mask of layers with this window, in the form that the attention implementation takes.

    Made on the device, because it is L times as large as the tokens.
    """
    sees, (batch, length) = mask_function(packed, window), packed.input_ids.shape
    device = packed.input_ids.device
    if attention == FLEX:
        create = _compiled_block_mask() if device.type == "cuda" else create_block_mask
        return create(sees, batch, None, length, length, device)
    row, index = torch.arange(batch, device=device), torch.arange(length, device=device)
    return _as_taken(sees(row[:, None, None], None, index[:, None], index)[:, None], attention, dtype)


def _as_taken(mask: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """Returns a mask, bool, as the attention implementation takes it: eager attention adds numbers to the logits."""
    if attention == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    """Returns ``create_block_mask`` compiled, which does not store the whole mask on its way."""
    return torch.compile(create_block_mask)


def mask_function(packed: Packed, window: int | None) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """Returns whether a query sees a key, as a function of row, head, and their two indices in the row.

    Padding sees the prompts before it. No query may be without a key, and what padding alone gives may be 0, where the
    norms of some families have no gradient.
    """

    def sees(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        sequence, segment = packed.sequence[row, query], packed.segment[row, query]
        own_sequence = (packed.sequence[row, key] == sequence) | (sequence < 0)
        own_segment = (packed.segment[row, key] == 0) | (packed.segment[row, key] == segment)
        seen = own_sequence & own_segment & (key <= query)
        if window is not None:
            seen = seen & (packed.position_ids[row, query] - packed.position_ids[row, key] < window)
        return seen

    return sees
