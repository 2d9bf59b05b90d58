"""All that the pages know of the core: forms to runs, plans, stored runs, pictures and statistics."""
