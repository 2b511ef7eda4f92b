"""Characters, bytes and byte pairs: text to ids and back, and the files that say how."""
