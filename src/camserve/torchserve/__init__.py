"""Generated protobuf code; `make proto` rebuilds it."""
