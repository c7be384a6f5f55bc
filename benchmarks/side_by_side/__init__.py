"""isthmus beside other libraries: the same weights and inputs, equal results first, then times in turns."""
