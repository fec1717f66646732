"""What vtc knows of transformers' insides: every name, once.

Releases of transformers rename arguments and move methods. Everything else in vtc speaks by *role* ("the cache", "the
mask"), and the modules here find out how the running release and the model at hand spell it: from signatures and types,
when a model is patched. What cannot be found is refused there, with the name that was looked for; nothing is guessed.

``arguments`` has what modules are called with, ``modules`` the parts of a model, ``attention`` the insides of a decoder
layer, ``caches`` and ``masks`` theirs, ``generation`` the methods of ``generate``, ``releases`` what was tested. A test
sees to it that no other file spells such a name.
"""
