"""Everything written to disk: adapters in the HF PEFT format, merged models, resumable state."""
