"""Which layer, side or head gets how many bits: RateQuant.

``sensitivity`` measures what an error costs (gradients), ``curves`` what each width leaves, ``attribution`` corrects
that at a real operating point, ``allocation`` solves for widths, ``ratequant`` is the way in. Each step's result is a
frozen dataclass that can be saved. Nothing here knows a cache; a cache knows an allocation as a mapping from units to
widths.
"""
