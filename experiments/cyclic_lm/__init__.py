"""A language model in a game whose duality gap is exact.

The preference depends on a response only through its class, and the classes beat each other round a cycle. No opponent
gains more against π on a prompt x than the best class does, 2·max_c (P π_x)_c − 1, where π_x are the shares of the
classes among responses of π to x: no search for a best response, no judge.

``recipe`` has the arms and the options; ``jobs`` runs them with the trainer, a process each; ``measures`` reads a
finished run; ``results`` reads the files of results; ``comparison`` compares arms over seeds; ``page`` writes what came
out.
"""
