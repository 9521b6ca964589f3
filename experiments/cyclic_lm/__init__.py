"""A language model in a game whose duality gap is exact.

The preference depends on a response only through its class, and the classes beat each other round a cycle. No policy
can gain more against π than the best class does, so that the duality gap over *all* policies is 2·max_c (P π̂)_c − 1,
where π̂ are the shares of the classes among responses of π: no search for a best response, no judge.

``recipe`` has the prompts, the arms and the options; ``jobs`` runs them with the trainer, a process each; ``measures``
reads a finished run; ``comparison`` compares arms over seeds; ``page`` writes what came out.
"""
