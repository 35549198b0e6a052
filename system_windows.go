package main

import (
	"cmp"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	sys "golang.org/x/sys/windows"
)

// writeDurably writes a file and waits until it is on the disk. Windows has no way to rename it
// that survives a loss of power for certain; what was cut off is found by its checksum.
func writeDurably(root *os.Root, name string, data []byte) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
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

// syncPath does nothing: Windows has no way to do it.
func syncPath(string) error { return nil }

// isOwn is left to Windows: what a user may write there, others may not by default.
func isOwn(fs.FileInfo) bool { return true }

// readNow reads what is there from conn, and returns os.ErrDeadlineExceeded if there is nothing
// yet.
func readNow(conn *net.TCPConn, p []byte) (n int, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		return 0, err
	}
	return conn.Read(p)
}

// unacknowledged returns 0: Windows does not tell how many bytes the other side's system has not
// taken.
func unacknowledged(*net.TCPConn) int { return 0 }

// socketError returns an error of conn that came after the last call.
func socketError(conn *net.TCPConn) error {
	const soError = 0x1007 // of winsock2.h
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	code := 0
	closed := raw.Control(func(fd uintptr) {
		code, err = sys.GetsockoptInt(sys.Handle(fd), sys.SOL_SOCKET, soError)
	})
	if code != 0 {
		err = os.NewSyscallError("read", syscall.Errno(code))
	}
	return cmp.Or(closed, err)
}
