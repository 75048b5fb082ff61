"""Linear attention: Momentum DeltaNet and its family."""
