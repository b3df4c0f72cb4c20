"""Everything a user can set for a run, and which settings go together. It must never know a model, data or ranks."""
