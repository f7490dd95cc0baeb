"""Label Studio, review pages and gold data; nothing lives here yet."""
