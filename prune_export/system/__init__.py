"""What files, locks and platforms are to us: safe opening, temporary directories, places to write.

Nothing here knows of models. `platforms` holds what not every operating system has.
"""
