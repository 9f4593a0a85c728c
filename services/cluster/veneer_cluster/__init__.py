"""A whole cluster on one machine: `veneer up` and what belongs to it. Owns processes, not what they do."""
