"""Real mail software through a real gateway, beside tcpdump: `make test-mail`, docs/explanation/mail.md."""
