"""What an auditor sees: reports that trust nothing, verdicts, and differences."""
