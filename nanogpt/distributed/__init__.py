"""One run on many processes: who they are, what each holds, what they send, what it costs on paper."""
