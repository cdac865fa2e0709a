"""Opening a finished run, model or adapter, and generating text with it."""
