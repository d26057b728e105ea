"""What users call: check, plan, one call of the engine."""
