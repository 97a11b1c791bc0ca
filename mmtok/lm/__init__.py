"""Language models over mmtok's ids: new rows for new ids, documents, constrained decoding, heads."""
