"""The recipe that rebuilds the pocket model; ``README.md`` beside this says how to run it."""
