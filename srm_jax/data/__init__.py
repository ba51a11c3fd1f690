"""Text to batches: tokenizers, packing (the only shift), resumable pipelines, annotation records."""
