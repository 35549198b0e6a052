package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

type metric struct {
	path  string // the container's or host's part of the name: see graphitePath
	own   string // the rest, from the dot on: all containers or hosts share it
	value value
	time  int64 // Unix seconds
}

// value is a number that is never negative: either whole, with all digits of a uint64, or with up
// to three decimals.
type value struct {
	n          uint64
	thousandth bool // the unit of n
}

func whole(n uint64) value { return value{n: n} }

// decimal rounds f to three decimals. ok is false if f is negative, infinite, not a number, or too
// large for that.
func decimal(f float64) (v value, ok bool) {
	thousandths := math.Round(f * 1000)
	if !(thousandths >= 0 && thousandths <= 1e15) { // all of whose digits a float64 has
		return value{}, false
	}
	return value{uint64(thousandths), true}, true
}

// parseValue is the reverse of append. ok is false for what append does not write.
func parseValue(text string) (v value, ok bool) {
	if n, err := strconv.ParseUint(text, 10, 64); err == nil {
		return whole(n), true
	}
	f, err := strconv.ParseFloat(text, 64)
	v, ok = decimal(f)
	return v, ok && err == nil && string(v.append(nil)) == text
}

// append appends v in plain decimal notation, which JSON and Carbon share.
func (v value) append(b []byte) []byte {
	if v.thousandth {
		return strconv.AppendFloat(b, float64(v.n)/1000, 'f', -1, 64)
	}
	return strconv.AppendUint(b, v.n, 10)
}

// appendLine appends m as a line of Carbon's plaintext protocol, "name value timestamp":
// https://graphite.readthedocs.io/en/latest/feeding-carbon.html#the-plaintext-protocol.
func (m metric) appendLine(b []byte) []byte {
	b = append(append(b, m.path...), m.own...)
	b = append(b, ' ')
	b = m.value.append(b)
	b = append(b, ' ')
	b = strconv.AppendInt(b, m.time, 10)
	return append(b, '\n')
}

// appendJSON appends m as Backstop wants it:
// https://github.com/obfuscurity/backstop#sending-metrics.
func (m metric) appendJSON(b []byte) []byte {
	b = append(b, `{"metric":"`...)
	b = append(append(b, m.path...), m.own...) // a Graphite path has nothing in it to escape
	b = append(b, `","value":`...)
	b = m.value.append(b)
	b = append(b, `,"measure_time":`...)
	b = strconv.AppendInt(b, m.time, 10)
	return append(b, '}')
}

// encode returns the body of a request to Backstop.
func encode(metrics []metric) []byte {
	body := make([]byte, 0, 2+100*len(metrics))
	body = append(body, '[')
	for i, m := range metrics {
		if i > 0 {
			body = append(body, ',')
		}
		body = m.appendJSON(body)
	}
	return append(body, ']')
}

// decode is the reverse of encode. Backstop checks nothing, so decode refuses whatever is not fit
// for Graphite: the file may be damaged, or somebody else's.
func decode(body []byte) ([]metric, error) {
	var items []struct {
		Metric      string      `json:"metric"`
		Value       json.Number `json:"value"`
		MeasureTime int64       `json:"measure_time"`
	}
	err := json.Unmarshal(body, &items)
	if kind, ok := err.(*json.UnmarshalTypeError); ok { // its text is about this code
		err = fmt.Errorf("%s in the wrong place: %s", jsonKind(kind), kind.Field)
	}
	if err != nil {
		return nil, fmt.Errorf("not metrics in JSON: %w", err)
	}
	metrics := make([]metric, len(items))
	for i, item := range items {
		v, ok := parseValue(item.Value.String())
		if !ok || !isGraphitePath(item.Metric) || item.MeasureTime <= 0 {
			return nil, fmt.Errorf("item %d is no metric: %.200q = %.50q at %d",
				i+1, item.Metric, item.Value, item.MeasureTime)
		}
		metrics[i] = metric{item.Metric, "", v, item.MeasureTime}
	}
	return metrics, nil
}

// The functions below take bodies apart that encode wrote. No name, number or time has a brace in
// it, so braces alone tell where a metric begins and ends.

// countOf returns the number of metrics in body.
func countOf(body []byte) int { return bytes.Count(body, []byte("{")) }

// cut cuts body in two behind the nth metric; rest is nil if there are no more.
func cut(body []byte, n int) (first, rest []byte) {
	end := 0
	for range n {
		end += bytes.IndexByte(body[end:], '}') + 1
	}
	if end+1 >= len(body) {
		return body, nil
	}
	return slices.Concat(body[:end], []byte("]")), slices.Concat([]byte("["), body[end+1:])
}

// join puts the metrics of all parts into one body.
func join(parts [][]byte) []byte {
	items := make([][]byte, len(parts))
	for i, part := range parts {
		items[i] = part[1 : len(part)-1]
	}
	return slices.Concat([]byte("["), bytes.Join(items, []byte(",")), []byte("]"))
}

// lastOf returns the last metric of body, in a body of its own.
func lastOf(body []byte) []byte {
	if i := bytes.LastIndexByte(body, '{'); i > 0 {
		return slices.Concat([]byte("["), body[i:])
	}
	return body
}

// Lengths in bytes. Carbon makes a folder of each node, and common file systems allow names of
// maxNode. Carbon also closes the connection after a line of over 16,384 bytes.
const (
	maxNode = 255
	maxPath = 1024
)

// graphitePath makes name a path that is safe on the wire and in Graphite: nodes of [A-Za-z0-9_-]
// between single dots. Every other character becomes "_"; empty nodes go. Neither Backstop nor
// Carbon checks names: a newline in one could forge a second metric.
func graphitePath(name string) string {
	nodes := strings.FieldsFunc(name, func(r rune) bool { return r == '.' })
	for i, node := range nodes {
		nodes[i] = graphiteNode(node)
	}
	path := strings.Join(nodes, ".")
	return strings.TrimSuffix(path[:min(len(path), maxPath)], ".")
}

// isGraphitePath reports whether name is a path from graphitePath, with or without the rest of a
// metric's name.
func isGraphitePath(name string) bool {
	for node := range strings.SplitSeq(name, ".") {
		if node == "" || graphiteNode(node) != node {
			return false
		}
	}
	return len(name) <= 2*maxPath
}

func graphiteNode(name string) string {
	node := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-':
			return r
		}
		return '_'
	}, name)
	return node[:min(len(node), maxNode)]
}
