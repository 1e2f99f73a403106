"""Who watches caches at work: the distortion of what is encoded, and tokens whose keys have an unusual norm.

A cache tells an observer; an observer changes no code, but for ``key_norm``, whose flags a cache may follow. They keep
statistics, never tokens.
"""
