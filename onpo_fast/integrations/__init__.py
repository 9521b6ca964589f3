"""The loss in other people's trainers: ``liger`` for a training loop of one's own, ``trl`` for TRL's.

Each is imported by name, since each may want a package that is not installed.
"""
