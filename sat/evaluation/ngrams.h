// Captions as words and n-grams for ngrams.cpp: words and n-grams are numbered in the order in which they first occur.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int N = 4;  // longest n-gram

struct Word {
  const char* at;
  int64_t size;
};

// Whether white space as Python's str.split() knows it begins at p, and how many bytes it has.
inline int space_at(const unsigned char* p, const unsigned char* end) {
  if (*p < 0x80) return (*p >= 9 && *p <= 13) || (*p >= 28 && *p <= 32);
  auto next = [&](int i) { return p + i < end ? p[i] : 0; };
  if (*p == 0xC2) return next(1) == 0x85 || next(1) == 0xA0 ? 2 : 0;
  if (*p == 0xE1) return next(1) == 0x9A && next(2) == 0x80 ? 3 : 0;
  if (*p == 0xE3) return next(1) == 0x80 && next(2) == 0x80 ? 3 : 0;
  if (*p != 0xE2) return 0;
  int last = next(2);
  if (next(1) == 0x80) return (last >= 0x80 && last <= 0x8A) || last == 0xA8 || last == 0xA9 || last == 0xAF ? 3 : 0;
  return next(1) == 0x81 && last == 0x9F ? 3 : 0;
}

void split(const char* text, int64_t size, std::vector<Word>& words) {  // as text.split()
  words.clear();
  auto p = reinterpret_cast<const unsigned char*>(text), end = p + size, begin = p;
  while (p < end) {
    int width = space_at(p, end);
    if (!width) {
      ++p;
      continue;
    }
    if (p > begin) words.push_back({reinterpret_cast<const char*>(begin), p - begin});
    p += width;
    begin = p;
  }
  if (p > begin) words.push_back({reinterpret_cast<const char*>(begin), p - begin});
}

void split_at_spaces(const char* text, int64_t size, std::vector<Word>& words) {  // as text.split(" ")
  words.clear();
  const char *begin = text, *end = text + size;
  for (const char* p = text; p < end; ++p)
    if (*p == ' ') {
      words.push_back({begin, p - begin});
      begin = p + 1;
    }
  words.push_back({begin, end - begin});
}

inline uint64_t mix(uint64_t h) {
  h ^= h >> 32;
  h *= 0xD6E8FEB86659FD93ull;
  return h ^ (h >> 32);
}

inline uint64_t hash_of(Word word) {
  uint64_t h = 0x9E3779B97F4A7C15ull + word.size;
  for (int64_t i = 0; i < word.size; i += 8) {
    uint64_t part = 0;
    std::memcpy(&part, word.at + i, std::min<int64_t>(8, word.size - i));
    h = mix(h ^ part) * 0x9E3779B97F4A7C15ull;
  }
  return mix(h);
}

// Words -> numbers from 1 in the order of arrival; emptied at no cost. The words' bytes belong to the caller.
class Words {
 public:
  void clear() {
    ++epoch_;
    words_.clear();
  }
  uint32_t add(Word word) { return place(word, true); }
  uint32_t find(Word word) { return place(word, false); }  // 0: not there
  size_t size() const { return words_.size(); }
  std::vector<Word>& all() { return words_; }

 private:
  struct Slot {
    uint64_t hash, epoch;
    uint32_t number;
  };
  uint32_t place(Word word, bool insert) {
    if (insert && slots_.size() < 2 * words_.size() + 16) grow();
    if (slots_.empty()) return 0;
    uint64_t hash = hash_of(word), mask = slots_.size() - 1;
    for (uint64_t i = hash & mask;; i = (i + 1) & mask) {
      Slot& slot = slots_[i];
      if (slot.epoch != epoch_) {
        if (!insert) return 0;
        words_.push_back(word);
        slot = {hash, epoch_, static_cast<uint32_t>(words_.size())};
        return slot.number;
      }
      if (slot.hash == hash) {
        Word& other = words_[slot.number - 1];
        if (other.size == word.size && !std::memcmp(other.at, word.at, word.size)) return slot.number;
      }
    }
  }
  void grow() {
    std::vector<Slot> old;
    old.swap(slots_);
    slots_.assign(std::max<size_t>(64, 4 * old.size()), {0, 0, 0});
    uint64_t mask = slots_.size() - 1;
    for (Slot& slot : old)
      if (slot.epoch == epoch_) {
        uint64_t i = slot.hash & mask;
        while (slots_[i].epoch == epoch_) i = (i + 1) & mask;
        slots_[i] = slot;
      }
  }
  std::vector<Slot> slots_;
  std::vector<Word> words_;
  uint64_t epoch_ = 1;
};

// An n-gram: the number of the n-gram of all its words but the last, plus one (0 if it has one word), and that word's.
inline uint64_t key(uint64_t before, uint32_t word) { return before << 32 | word; }

// N-grams -> numbers from 0 in the order of arrival; that of its beginning is always lower.
class Grams {
 public:
  void clear() {
    for (uint32_t place : used_) slots_[place].number = 0;
    used_.clear();
    keys_.clear();
  }
  uint32_t add(uint64_t key) {
    if (slots_.size() < 2 * keys_.size() + 16) grow();
    uint64_t mask = slots_.size() - 1;
    for (uint64_t i = hash(key) & mask;; i = (i + 1) & mask) {
      Slot& slot = slots_[i];
      if (!slot.number) {
        keys_.push_back(key);
        used_.push_back(i);
        slot = {key, static_cast<uint32_t>(keys_.size())};
        return slot.number - 1;
      }
      if (slot.key == key) return slot.number - 1;
    }
  }
  int64_t find(uint64_t key) const {  // -1: not there
    if (slots_.empty()) return -1;
    uint64_t mask = slots_.size() - 1;
    for (uint64_t i = hash(key) & mask;; i = (i + 1) & mask) {
      const Slot& slot = slots_[i];
      if (!slot.number) return -1;
      if (slot.key == key) return slot.number - 1;
    }
  }
  size_t size() const { return keys_.size(); }
  uint64_t operator[](size_t i) const { return keys_[i]; }

 private:
  struct Slot {
    uint64_t key;
    uint32_t number;  // plus one, 0: free
  };
  static uint64_t hash(uint64_t key) {
    key *= 0x9E3779B97F4A7C15ull;
    return key ^ key >> 32;
  }
  void grow() {
    slots_.assign(std::max<size_t>(1024, 2 * slots_.size()), {0, 0});
    uint64_t mask = slots_.size() - 1;
    used_.clear();
    for (uint32_t number = 0; number < keys_.size(); ++number) {
      uint64_t i = hash(keys_[number]) & mask;
      while (slots_[i].number) i = (i + 1) & mask;
      slots_[i] = {keys_[number], number + 1};
      used_.push_back(i);
    }
  }
  std::vector<Slot> slots_;
  std::vector<uint32_t> used_;
  std::vector<uint64_t> keys_;
};

struct Count {
  uint32_t gram;
  uint32_t times;
};

// A caption's n-grams by length, each with how often it occurs, in the order of first occurrence.
struct Bag {
  std::vector<Count> of[N];
  int64_t words = 0;
  int64_t bigrams() const { return std::max<int64_t>(0, words - 1); }
};

class Counter {
 public:
  // `place`: the numbers of n-grams, of one image; `slot_` is all zero between calls.
  void count(const std::vector<uint32_t>& words, Grams& place, Bag& bag) {
    bag.words = words.size();
    before_.assign(words.size(), 0);
    for (int n = 1; n <= N; ++n) {
      auto& counts = bag.of[n - 1];
      counts.clear();
      for (int64_t i = 0; i + n <= bag.words; ++i) {
        uint32_t number = place.add(key(before_[i], words[i + n - 1]));
        before_[i] = number + 1;
        if (number >= slot_.size()) slot_.resize(2 * number + 64, 0);
        if (!slot_[number]) {
          counts.push_back({number, 0});
          slot_[number] = counts.size();
        }
        ++counts[slot_[number] - 1].times;
      }
      for (auto& each : counts) slot_[each.gram] = 0;
    }
  }

 private:
  std::vector<uint32_t> slot_, before_;
};

struct Texts {
  const char* at;
  const int64_t* sizes;
  Word next() {
    Word text{at, *sizes++};
    at += text.size;
    return text;
  }
};

}  // namespace
