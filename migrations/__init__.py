"""The database's schema, one numbered file a change; an applied file is never edited."""
