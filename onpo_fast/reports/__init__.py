"""Evaluation, reports, exports, model cards and uploads of a run."""
