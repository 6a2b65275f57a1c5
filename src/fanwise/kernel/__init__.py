"""What Linux speaks: constants, record layouts, system calls, the native drain. No policy."""
