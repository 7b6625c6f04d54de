package registry_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

const (
	tokenService = "lab registry"
	tokenIssuer  = "lab tokens"
)

// tokenServer issues docker's tokens to whoever has the login, as
// https://distribution.github.io/distribution/spec/auth/token/ has it.
type tokenServer struct {
	*httptest.Server
	as    login
	life  time.Duration
	roots string // file

	t      *testing.T
	signer *authority

	mu     sync.Mutex
	issued []string
	asked  []http.Header
	scopes []string
	hook   func(http.ResponseWriter, *http.Request) bool
}

// newTokenServer starts one whose tokens live for some time.
func newTokenServer(t *testing.T, as login, life time.Duration) *tokenServer {
	t.Helper()
	s := &tokenServer{as: as, life: life, t: t, signer: newAuthority(t)}
	s.roots = s.signer.file
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

// config is what a registry has to know of it.
func (s *tokenServer) config() *kit.RegistryToken {
	return &kit.RegistryToken{Realm: s.URL + "/token", Service: tokenService, Issuer: tokenIssuer, Roots: s.roots}
}

// setHook lets hook answer instead, as long as it returns true.
func (s *tokenServer) setHook(hook func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	s.hook = hook
	s.mu.Unlock()
}

// ServeHTTP implements http.Handler.
func (s *tokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm()
	s.mu.Lock()
	s.asked = append(s.asked, r.Header.Clone())
	s.scopes = append(s.scopes, r.Form["scope"]...)
	hook := s.hook
	s.mu.Unlock()
	if hook != nil && hook(w, r) {
		return
	}
	user, password, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, password = r.PostForm.Get("username"), r.PostForm.Get("password")
	}
	if (login{user, password}) != s.as {
		http.Error(w, `{"details": "wrong"}`, http.StatusUnauthorized)
		return
	}
	token, err := s.issue(r.Form["scope"])
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"token": token, "access_token": token, "expires_in": int(s.life.Seconds()), "issued_at": time.Now().UTC().Format(time.RFC3339),
	})
}

func (s *tokenServer) issue(scopes []string) (string, error) {
	type access struct {
		Type    string   `json:"type"`
		Name    string   `json:"name"`
		Actions []string `json:"actions"`
	}
	granted := []access{}
	for _, scope := range strings.Fields(strings.Join(scopes, " ")) {
		if parts := strings.Split(scope, ":"); len(parts) == 3 {
			granted = append(granted, access{parts[0], parts[1], []string{"pull"}})
		}
	}
	now := time.Now()
	token := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{
		"iss": tokenIssuer, "sub": s.as.user, "aud": tokenService, "jti": now.Format(time.RFC3339Nano), "access": granted,
		"iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": jwt.NewNumericDate(now.Add(s.life)).Unix(),
		"ends": now.Add(s.life).UnixMilli(),
	})
	token.Header["x5c"] = []string{base64.StdEncoding.EncodeToString(s.signer.cert.Raw)}
	text, err := token.SignedString(s.signer.key)
	s.mu.Lock()
	s.issued = append(s.issued, text)
	s.mu.Unlock()
	return text, err
}

// tokens lists what was issued.
func (s *tokenServer) tokens() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.issued)
}

// ended tells whether a token is of the server and has ended, to the millisecond.
func (s *tokenServer) ended(token string) bool {
	claims := jwt.MapClaims{}
	_, err := jwt.NewParser(jwt.WithoutClaimsValidation()).ParseWithClaims(token, claims, func(*jwt.Token) (any, error) { return s.signer.cert.PublicKey, nil })
	if err != nil {
		return false // the registry says what is wrong with it
	}
	ends, _ := claims["ends"].(float64)
	return time.Now().UnixMilli() > int64(ends)
}

// refuseEnded refuses tokens that have ended as the registry would, a minute earlier.
func (s *tokenServer) refuseEnded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok || !s.ended(token) {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+s.URL+`/token",service="`+tokenService+`",scope="repository:`+repository+`:pull",error="invalid_token"`)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
	})
}
