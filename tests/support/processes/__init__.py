"""Run `tutor` and Docker; kill, interrupt and observe processes; mount a small disk."""
