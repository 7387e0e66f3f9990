"""What a person looks at: one page without a server, and its tables and plots."""
