package harness

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// StandIn answers as Backstop does, with "docker" as its only prefix, and keeps what Backstop
// would pass to Carbon. It is strict where Backstop is not: a name or a number that breaks the
// metric contract fails the test, as nothing behind Backstop would tell.
type StandIn struct {
	*httptest.Server
	complain func(format string, args ...any)

	// Bad is "name time" of a metric that is refused, though it is one.
	Bad string
	// Patient lets requests overlap: a client that gives one up may be back before it is noticed.
	Patient bool

	mu       sync.Mutex
	auth     string            // user:password, "" for none wanted
	fault    http.HandlerFunc  // answers in Backstop's place
	points   map[string]string // "name time" → value
	requests []int             // items of each request that was taken
	inFlight *int
	arrived  chan struct{} // closed at the next arrival
	carbon   connection
}

// connection is Backstop's to Carbon.
type connection struct {
	roundTrip time.Duration
	dead      bool
	deadSince time.Time // when the first line was written to it after Carbon's end, zero if none was
}

// NewStandIn starts a stand-in that ends with the test.
func NewStandIn(t testing.TB) *StandIn {
	t.Helper()
	s := UnstartedStandIn(t.Errorf)
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Stop)
	return s
}

// UnstartedStandIn returns a stand-in without a server, which complains of what breaks the
// contract.
func UnstartedStandIn(complain func(string, ...any)) *StandIn {
	return &StandIn{
		complain: complain, points: map[string]string{}, inFlight: new(int), arrived: make(chan struct{}),
	}
}

// Stop cuts off the requests that are under way, and ends.
func (s *StandIn) Stop() {
	s.CloseClientConnections()
	s.Close()
}

// Set changes how the stand-in answers.
func (s *StandIn) Set(auth string, fault http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.auth, s.fault = auth, fault
}

// At returns the stand-in's URL with these credentials, user:password or "", and path.
func (s *StandIn) At(credentials, path string) string {
	if credentials != "" {
		credentials += "@"
	}
	return strings.Replace(s.URL, "http://", "http://"+credentials, 1) + path
}

// Drop cuts off the requests that are under way.
func (s *StandIn) Drop() {
	s.mu.Lock()
	s.inFlight = new(int) // those cut off may take a moment to notice
	s.mu.Unlock()
	s.CloseClientConnections()
}

// Await waits until some points whose names match the pattern have arrived, or t fails.
func (s *StandIn) Await(pattern string, want int, within time.Duration) error {
	re := regexp.MustCompile(pattern)
	deadline := time.After(within)
	for {
		s.mu.Lock()
		arrived, have := s.arrived, 0
		for point := range s.points {
			if re.MatchString(point) {
				have++
			}
		}
		s.mu.Unlock()
		if have >= want {
			return nil
		}
		select {
		case <-arrived:
		case <-deadline:
			return fmt.Errorf("%d points that match %s after %s, want %d", have, pattern, within, want)
		}
	}
}

// Lines returns what arrived, as sorted Carbon lines.
func (s *StandIn) Lines() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lines []string
	for point, value := range s.points {
		name, at, _ := strings.Cut(point, " ")
		lines = append(lines, name+" "+value+" "+at+"\n")
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// Points returns the values of what arrived, by "name time".
func (s *StandIn) Points() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.points)
}

// Requests returns how many items each request had that was taken.
func (s *StandIn) Requests() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Forget forgets the points that arrived.
func (s *StandIn) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.points)
}

var (
	node      = `[A-Za-z0-9_-]{1,255}`
	goodName  = regexp.MustCompile(`^` + node + `(\.` + node + `)+$`)
	badEnd    = regexp.MustCompile(`\.(max|min|count)$`) // Carbon's default aggregation rules
	goodValue = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]{1,3})?$`)
)

// IsGoodName reports whether Graphite can keep a metric of that name.
func IsGoodName(name string) bool { return goodName.MatchString(name) && !badEnd.MatchString(name) }

// IsGoodValue reports whether text is a number as the contract has it.
func IsGoodValue(text string) bool { return goodValue.MatchString(text) }

// ServeHTTP answers as usual, or as Set says.
func (s *StandIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	inFlight := s.inFlight
	if *inFlight++; *inFlight > 1 && !s.Patient {
		s.complain("%d requests in flight", *inFlight)
	}
	fault := s.fault
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		*inFlight--
		s.mu.Unlock()
	}()
	if fault != nil {
		fault(w, r)
		return
	}
	s.Answer(w, r)
}

// Answer answers as usual.
func (s *StandIn) Answer(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	auth := s.auth
	s.mu.Unlock()
	status, text := s.take(r, auth)
	w.WriteHeader(status)
	io.WriteString(w, text)
}

// authorized reports whether a request has these credentials, user:password, in a form that
// Backstop can take apart.
func authorized(r *http.Request, auth string) bool {
	user, password, _ := r.BasicAuth()
	return user+":"+password == auth && password != "" && !strings.ContainsAny(password, ":,")
}

// take checks a request in the order in which Backstop does.
func (s *StandIn) take(r *http.Request, auth string) (int, string) {
	if auth != "" && !authorized(r, auth) {
		return http.StatusUnauthorized, "Not authorized\n"
	}
	prefix, ok := strings.CutPrefix(r.URL.Path, "/publish/")
	if !ok || r.Method != http.MethodPost || strings.Contains(prefix, "/") || prefix == "" {
		const ditty = "Sinatra doesn't know this ditty. "
		return http.StatusNotFound, "<!DOCTYPE html>\n<html><body>" + strings.Repeat(ditty, 4000)
	}
	if prefix != "docker" {
		return http.StatusNotFound, "unknown prefix"
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return http.StatusBadRequest, ""
	}
	kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	var items []map[string]json.RawMessage
	if kind != "application/json" || json.Unmarshal(body, &items) != nil {
		return http.StatusBadRequest, "JSON is required"
	}
	return s.takeAll(items)
}

// takeAll stores items up to the first bad one.
func (s *StandIn) takeAll(items []map[string]json.RawMessage) (int, string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, item := range items {
		if len(item["metric"]) == 0 || len(item["value"]) == 0 || len(item["measure_time"]) == 0 {
			return http.StatusBadRequest, "missing fields"
		}
		if s.Bad == strings.Trim(string(item["metric"]), `"`)+" "+string(item["measure_time"]) {
			return http.StatusBadRequest, "missing fields"
		}
		s.store(item)
	}
	s.requests = append(s.requests, len(items))
	close(s.arrived)
	s.arrived = make(chan struct{})
	return http.StatusOK, "ok"
}

// RestartCarbon leaves the stand-in with a dead connection to Carbon, that far away, as a restart
// of Carbon does with Backstop.
func (s *StandIn) RestartCarbon(roundTrip time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.carbon = connection{roundTrip: roundTrip, dead: true}
}

// reaches reports whether the next line reaches Carbon. Backstop swallows errors of writing. On a
// dead connection the first write succeeds, and so do all others until Carbon's host has answered
// it, a round trip later; the write after that fails, and with the next one Backstop makes a new
// connection.
func (c *connection) reaches() bool {
	switch {
	case !c.dead:
		return true
	case c.deadSince.IsZero():
		c.deadSince = time.Now()
	case time.Since(c.deadSince) >= c.roundTrip:
		c.dead = false
	}
	return false
}

func (s *StandIn) store(item map[string]json.RawMessage) {
	var name string
	if err := json.Unmarshal(item["metric"], &name); err != nil || !IsGoodName(name) {
		s.complain("metric %s is not one that Graphite can keep", item["metric"])
	}
	if len(item) != 3 {
		s.complain("%s has %d fields", name, len(item))
	}
	value := string(bytes.TrimSpace(item["value"]))
	if !IsGoodValue(value) {
		s.complain("%s has the value %s", name, value)
	}
	at, err := strconv.ParseInt(string(item["measure_time"]), 10, 64)
	if err != nil || at < 1_000_000_000 || at > 9_999_999_999 {
		s.complain("%s has the time %s, not whole Unix seconds", name, item["measure_time"])
	}
	if s.carbon.reaches() {
		s.points[fmt.Sprintf("%s %d", name, at)] = value
	}
}

// Hang is a fault: no answer for as long as the client waits for one.
func Hang(_ http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) // else net/http does not see that the client left
	<-r.Context().Done()
}

// AnswerWith is a fault: always the same answer.
func AnswerWith(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}
