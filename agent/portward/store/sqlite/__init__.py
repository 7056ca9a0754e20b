"""The embedded store: an SQLite database in WAL mode.

An accepted revision survives a power cut: `synchronous=FULL` syncs the log of each commit. NORMAL would be faster,
but could lose the last changes, and one of them may be a revocation.

A process that only reads writes too, to the index that WAL keeps beside the database (`-shm`).

The format is 2. Format 1 has the same records, and a log without hashes. It is read as it is. A process that
writes to it, or that opens it to write, first seals its log: it adds the hashes in one transaction.

In reading order: `store`, the methods of a store · `log`, the log and its hashes · `database`, the file, its locks
and its errors · `schema`, the SQL · `cells`, what a column may contain.
"""
