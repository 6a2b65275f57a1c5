"""Notify: fsnotify in user space. Many groups on one source, sans-I/O, without threads and locks.

One owner (a thread or a loop) calls it; plain methods are atomic. What takes several steps is a
`fanwise.lifetime.Run`, and others may act between its steps. Write-back errors and `health PATH`
come through it; it is the core of the daemon to come.
"""
