"""The loss in other trainers: ``liger`` replaces Liger's DPO loss in a training loop, ``trl`` has a trainer for TRL.

Import them by name; ``trl`` needs TRL to be installed.
"""
