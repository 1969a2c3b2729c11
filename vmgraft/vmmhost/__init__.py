"""The minimal host: a privileged core that runs the guest, an unprivileged layer that runs extensions."""
