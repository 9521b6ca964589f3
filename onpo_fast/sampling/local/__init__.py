"""Sampling in this process, on the policy's device."""
