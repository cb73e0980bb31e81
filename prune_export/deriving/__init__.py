"""Makes and proves a table for a model type that has none.

The config is shrunk so that every size is another number, a random model of it is made, and its
modules are watched while single channels are moved: that tells queries from keys, gates from what
they gate, and what is added to the residual stream. The table that comes of it is then proven as
ours are (`proof`), on that random model; what is not proven is refused. ADR 0039.

Only code of transformers runs, never a checkpoint's own.
"""
