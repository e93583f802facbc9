"""Any source of captioned photos, as torch datasets; features kept on disk."""
