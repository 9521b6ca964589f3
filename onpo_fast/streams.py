"""The random streams of a run: the second number of a seed, after --seed, keeps them apart."""

SAMPLING = 0  # responses that are learnt from
EVALUATION = 1  # responses to held-out prompts
PAIRING = 2  # pairs and drawn labels
ORDER = 3  # of the pairs in a fit
EXPORT = 4  # answers for AlpacaEval
OPPONENT = 5  # responses of an opponent
ROUNDING = 6  # stochastic rounding
ADAPTER = 7  # first weights of LoRA
BEST_OF_NASH = 8  # responses that best of Nash chooses from: other draws than those it is compared with
ENVIRONMENT = 9  # replies of the environment
SELECTION = 10  # which pairs the oracle is asked about
