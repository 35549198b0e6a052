package main

import (
	"io/fs"
	"os"
	"path/filepath"
)

// writeDurably writes a file and waits until it is on the disk. Windows has no way to rename it
// that survives a loss of power for certain; what was cut off is found by its checksum.
func writeDurably(dir, name string, data []byte) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(data); err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	return err
}

// syncFolder does nothing: Windows has no way to do it.
func syncFolder(string) error { return nil }

// isOwn is left to Windows: what a user may write there, others may not by default.
func isOwn(fs.FileInfo) bool { return true }
