"""Several turns: the policy speaks, an environment answers, and the oracle compares whole conversations.

This is the contextual MDP of arXiv 2502.16852, appendix B, on a language model. ``games.multiturn`` plays the same form
in games small enough to be exact.
"""
