package main

import (
	"io/fs"
	"net"
	"os"
	"time"

	sys "golang.org/x/sys/windows"
)

// syncFolder does nothing: Windows has no way to do it.
func syncFolder(func(string) (*os.File, error), string) error { return nil }

// isOwn is left to Windows: what a user may write there, others may not by default.
func isOwn(fs.FileInfo) bool { return true }

// readNow reads what is there from conn, and returns os.ErrDeadlineExceeded if there is nothing
// yet.
func readNow(conn *net.TCPConn, p []byte) (n int, err error) {
	conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond)) // fails as Read does
	return conn.Read(p)
}

// unacknowledged returns 0: Windows does not tell how many bytes the other side's system has not
// taken.
func unacknowledged(*net.TCPConn) int { return 0 }

// takeError returns SO_ERROR of a socket, 0 for none.
func takeError(fd uintptr) (code int, err error) {
	const soError = 0x1007 // of winsock2.h
	return sys.GetsockoptInt(sys.Handle(fd), sys.SOL_SOCKET, soError)
}
