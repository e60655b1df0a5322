"""Golden outputs: what the bridge made of a covering set of models, on record.

`covering` picks which combinations of traits are met, `cases` makes models of them, `observe` says
what the bridge makes of a model, `compare` holds that against a record, `store` reads and writes
the records, and `work` does it for all of them.
"""
