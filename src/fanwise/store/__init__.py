"""The one way to open a database: SQLite, WAL, application id, version, migrations."""
