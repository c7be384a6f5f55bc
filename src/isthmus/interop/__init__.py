"""Other people's checkpoints: one file per origin, ``*_from_<origin>`` and ``*_to_<origin>`` as pure maps on state
dicts and configurations.
"""
