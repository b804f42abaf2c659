"""``fedsplit evaluate``: how good a model or a run is."""
