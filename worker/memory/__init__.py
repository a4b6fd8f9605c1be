"""How many bytes training takes, computed from a model's config.json before torch is imported.

In: config.json, a number of tokens, a way of applying. Out: a plan, row by row, or a refusal with numbers.
"""
