package main

import "strconv"

// metric is one point of a Graphite series, in the form Backstop takes it:
// https://github.com/obfuscurity/backstop#sending-metrics.
type metric struct {
	Name  string `json:"metric"`       // a safe Graphite path: see graphitePath
	Value uint64 `json:"value"`        // all the contract's values are whole and never negative
	Time  int64  `json:"measure_time"` // Unix seconds
}

// appendLine appends m as a line of Carbon's plaintext protocol, "name value timestamp":
// https://graphite.readthedocs.io/en/latest/feeding-carbon.html#the-plaintext-protocol.
func (m metric) appendLine(b []byte) []byte {
	b = append(b, m.Name...)
	b = append(b, ' ')
	b = strconv.AppendUint(b, m.Value, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, m.Time, 10)
	return append(b, '\n')
}
