"""Before a run: does it fit, what does it move, what does it cost."""
