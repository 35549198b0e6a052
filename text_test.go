package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"

	docker "github.com/fsouza/go-dockerclient"
)

func TestErrorsOfOthersArePlain(t *testing.T) {
	reset := func(port int) error {
		return &url.Error{Op: "Get", URL: "http://engine/_ping", Err: fmt.Errorf("readLoop: %w", &net.OpError{
			Op: "read", Net: "tcp", Err: errors.New("connection reset by peer"),
			Source: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}, Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2375},
		})}
	}
	// The same trouble has the same text, whatever port it met, so that it is logged once.
	for _, port := range []int{58006, 58007} {
		if got, want := plainly(t.Context(), reset(port)).Error(), "read tcp 127.0.0.1:2375: connection reset by peer"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	page := &docker.Error{Status: 502, Message: "<html>\n" + strings.Repeat("<p>Bad gateway</p>\n", 10_000)}
	if got, want := plainly(t.Context(), page).Error(), "API error (502): <html>"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if plainly(t.Context(), nil) != nil || errorText(nil) != "" {
		t.Error("there is an error where there is none")
	}
}

func TestWhatMayBeSecretIsNotShown(t *testing.T) {
	for text, want := range map[string]string{
		"web":                      `"web"`,
		"two\nlines":               `"two\nlines"`,
		"https://h/publish/docker": "(not shown, as it may hold a password)",
		"user:secret@h":            "(not shown, as it may hold a password)",
	} {
		if got := shown(text); got != want {
			t.Errorf("%q is shown as %s", text, got)
		}
	}
}
