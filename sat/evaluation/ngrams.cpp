// BLEU's counts, ROUGE-L and CIDEr-D of tokenised captions, each as pycocoevalcap computes it, to the last bit.
//
// Texts come as UTF-8 in one buffer with their lengths; those of one image one after another: the caption that is
// scored, then its references. Sums run over the n-grams in the order in which they first occur in a caption, 1-grams
// first, as there. No compiler may contract a product and a sum into one rounding (-ffp-contract=off).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "ngrams.h"

namespace {

// Called by address, so that the compiler does not make x * x of pow(x, 2): numpy's scalars call libm, and differ.
double (*volatile power)(double, double) = std::pow;

// Document frequencies of n-grams; owns the bytes of its words.
struct Documents {
  Words words;
  Grams grams;
  std::vector<int32_t> frequency;  // of each of `grams`
  std::vector<char*> owned;
  std::vector<Bag> kept;  // of every reference, where they are the ones to be scored against
  int32_t most = 0;
  ~Documents() {
    for (char* each : owned) std::free(each);
  }
  void own(Word& word) {
    char* copy = static_cast<char*>(std::malloc(word.size));
    std::memcpy(copy, word.at, word.size);
    owned.push_back(copy);
    word.at = copy;
  }
};

struct Weights {
  double log_images, twice_variance;
  const double* log_frequency;  // [most + 1]; of 0 that of 1
  std::vector<double> square;   // of the weight of an n-gram that occurs once, by frequency; -1: not yet known
  std::vector<double> penalty;  // by difference in bigrams; -1: not yet known

  double weight(uint32_t times, int32_t frequency) const {
    return static_cast<double>(times) * (log_images - log_frequency[frequency]);
  }
  double squared(uint32_t times, int32_t frequency) {
    if (times != 1) return power(weight(times, frequency), 2.0);
    double& known = square[frequency];
    if (known < 0) known = power(weight(1, frequency), 2.0);
    return known;
  }
  double gauss(int64_t apart) {
    apart = std::abs(apart);
    auto value = [&] {
      double difference = static_cast<double>(apart);
      return power(2.718281828459045, -(difference * difference) / twice_variance);
    };
    if (apart >= static_cast<int64_t>(penalty.size())) return value();
    if (penalty[apart] < 0) penalty[apart] = value();
    return penalty[apart];
  }
};

// One image after another: its caption, then each of its references. N-grams have the image's own numbers, or the
// documents' where the references are theirs.
class Comparison {
 public:
  Comparison(Documents& documents, Weights& weights) : documents_(documents), weights_(weights) {}

  void begin(Bag& caption) {
    caption_ = &caption;
    norms(caption, norm_);
    std::fill(score_, score_ + N, 0.0);
  }
  void add(const Bag& reference) {
    double theirs[N];
    norms(reference, theirs);
    double penalty = weights_.gauss(caption_->bigrams() - reference.bigrams());
    for (int n = 0; n < N; ++n) {
      for (Count each : reference.of[n]) times[each.gram] = each.times;
      double value = 0;
      for (Count each : caption_->of[n])
        if (uint32_t there = times[each.gram]) {
          double weight = weights_.weight(there, frequency[each.gram]);
          value += std::min(weights_.weight(each.times, frequency[each.gram]), weight) * weight;
        }
      for (Count each : reference.of[n]) times[each.gram] = 0;
      if (norm_[n] != 0 && theirs[n] != 0) value /= norm_[n] * theirs[n];
      score_[n] += value * penalty;
    }
  }
  double score(int64_t references) const {
    double mean = (((score_[0] + score_[1]) + score_[2]) + score_[3]) / N;
    return mean / static_cast<double>(references) * 10.0;
  }
  void count(Word text, Grams& place, Bag& bag) {
    split(text.at, text.size, words_);
    numbers_.clear();
    for (Word word : words_) {
      uint32_t number = documents_.words.find(word);
      numbers_.push_back(number ? number : static_cast<uint32_t>(documents_.words.size()) + foreign.add(word));
    }
    counter_.count(numbers_, place, bag);
  }
  // Of the n-grams that `place` has beyond those of `there`: their numbers in the documents, -1: none has it.
  void look_up(const Grams& place, std::vector<int64_t>& there) const {
    for (size_t i = there.size(); i < place.size(); ++i) {
      uint64_t beginning = place[i] >> 32;
      int64_t found = beginning ? there[beginning - 1] : -1;
      if (!beginning || found >= 0) found = documents_.grams.find(key(found + 1, place[i]));
      there.push_back(found);
    }
  }

  Words foreign;                   // words that no document has
  std::vector<int32_t> frequency;  // of each n-gram
  std::vector<uint32_t> times;     // of each n-gram, in one reference; zero between references

 private:
  void norms(const Bag& bag, double* norm) {
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (Count each : bag.of[n]) sum += weights_.squared(each.times, frequency[each.gram]);
      norm[n] = std::sqrt(sum);
    }
  }
  Documents& documents_;
  Weights& weights_;
  Bag* caption_ = nullptr;
  double norm_[N], score_[N];
  Counter counter_;
  std::vector<Word> words_;
  std::vector<uint32_t> numbers_;
};

}  // namespace

extern "C" {

// counts [images, 10]: clipped matches 1..4, n-grams 1..4, words, words of the reference nearest in length.
void bleu_counts(int64_t images, const int64_t* references, const char* bytes, const int64_t* sizes, int64_t* counts) {
  Texts texts{bytes, sizes};
  Words vocabulary;
  Grams grams;
  Counter counter;
  Bag caption, reference;
  std::vector<Word> words;
  std::vector<uint32_t> numbers;
  std::vector<uint32_t> most;
  auto read = [&](Bag& bag) {
    Word text = texts.next();
    split(text.at, text.size, words);
    numbers.clear();
    for (Word word : words) numbers.push_back(vocabulary.add(word));
    counter.count(numbers, grams, bag);
  };
  for (int64_t image = 0; image < images; ++image) {
    int64_t* row = counts + 10 * image;
    vocabulary.clear();
    grams.clear();
    read(caption);
    most.assign(grams.size(), 0);
    int64_t nearest = 0, apart = INT64_MAX;
    for (int64_t r = 0; r < references[image]; ++r) {
      read(reference);
      for (auto& counts_of_n : reference.of)
        for (Count each : counts_of_n)
          if (each.gram < most.size()) most[each.gram] = std::max(most[each.gram], each.times);
      int64_t difference = std::abs(reference.words - caption.words);
      if (std::make_pair(difference, reference.words) < std::make_pair(apart, nearest))
        apart = difference, nearest = reference.words;
    }
    for (int n = 0; n < N; ++n) {
      row[n] = 0;
      for (Count each : caption.of[n]) row[n] += std::min(each.times, most[each.gram]);
      row[N + n] = std::max<int64_t>(0, caption.words - n);
    }
    row[2 * N] = caption.words;
    row[2 * N + 1] = nearest;
  }
}

// scores [images]: F of the longest common subsequence, of the best precision and the best recall over the references.
void rouge_l(int64_t images, const int64_t* references, const char* bytes, const int64_t* sizes, double beta_squared,
             double* scores) {
  Texts texts{bytes, sizes};
  Words vocabulary;
  std::vector<Word> words;
  std::vector<uint32_t> caption, reference;
  std::vector<uint64_t> where;  // of each word of the caption, the positions, as bits
  std::vector<int64_t> row;
  for (int64_t image = 0; image < images; ++image) {
    vocabulary.clear();
    Word text = texts.next();
    split_at_spaces(text.at, text.size, words);
    caption.clear();
    for (Word word : words) caption.push_back(vocabulary.add(word));
    bool is_short = caption.size() <= 64;
    where.assign(vocabulary.size() + 1, 0);
    if (is_short)
      for (size_t i = 0; i < caption.size(); ++i) where[caption[i]] |= 1ull << i;
    double precision = 0, recall = 0;
    for (int64_t r = 0; r < references[image]; ++r) {
      text = texts.next();
      split_at_spaces(text.at, text.size, words);
      int64_t common = 0;
      if (is_short) {  // Hyyro 2004: a row of the table of lengths as bits
        uint64_t v = ~0ull;
        for (Word word : words) {
          uint64_t u = v & where[vocabulary.find(word)];
          v = (v + u) | (v - u);
        }
        if (caption.size() < 64) v |= ~0ull << caption.size();
        common = __builtin_popcountll(~v);
      } else {
        row.assign(caption.size() + 1, 0);
        for (Word word : words) {
          uint32_t number = vocabulary.find(word);
          int64_t diagonal = 0;
          for (size_t i = 1; i <= caption.size(); ++i) {
            int64_t above = row[i];
            row[i] = caption[i - 1] == number ? diagonal + 1 : std::max(above, row[i - 1]);
            diagonal = above;
          }
        }
        common = row.back();
      }
      precision = std::max(precision, static_cast<double>(common) / static_cast<double>(caption.size()));
      recall = std::max(recall, static_cast<double>(common) / static_cast<double>(words.size()));
    }
    scores[image] = precision != 0 && recall != 0 ? ((1 + beta_squared) * precision * recall) /
                                                        (recall + beta_squared * precision)
                                                  : 0.0;
  }
}

// In how many of the images' sets of references each n-gram occurs; to be freed. `keep`: to be scored against, too.
void* documents_new(int64_t images, const int64_t* references, const char* bytes, const int64_t* sizes, int64_t keep) {
  auto* documents = new Documents;
  Texts texts{bytes, sizes};
  Grams seen;  // of one image
  Counter counter;
  Bag bag;
  std::vector<Word> words;
  std::vector<uint32_t> numbers, there;
  for (int64_t image = 0; image < images; ++image) {
    seen.clear();
    size_t first = documents->kept.size();
    for (int64_t r = 0; r < references[image]; ++r) {
      Word text = texts.next();
      split(text.at, text.size, words);
      numbers.clear();
      for (Word word : words) {
        size_t before = documents->words.size();
        numbers.push_back(documents->words.add(word));
        if (documents->words.size() > before) documents->own(documents->words.all().back());
      }
      counter.count(numbers, seen, bag);
      if (keep) documents->kept.push_back(bag);
    }
    there.resize(seen.size());
    for (size_t i = 0; i < seen.size(); ++i) {
      uint64_t beginning = seen[i] >> 32;
      uint32_t number = documents->grams.add(key(beginning ? there[beginning - 1] + 1 : 0, seen[i]));
      there[i] = number;
      if (number >= documents->frequency.size()) documents->frequency.push_back(0);
      documents->most = std::max(documents->most, ++documents->frequency[number]);
    }
    for (size_t i = first; i < documents->kept.size(); ++i)
      for (auto& counts : documents->kept[i].of)
        for (Count& each : counts) each.gram = there[each.gram];
  }
  return documents;
}

void documents_free(void* documents) { delete static_cast<Documents*>(documents); }

int64_t documents_most(void* documents) { return static_cast<Documents*>(documents)->most; }

// scores [images]: CIDEr-D with these document frequencies; log_frequency [most + 1], of 0 that of 1. `kept`: the texts
// are captions alone, to be scored against the documents' own references.
void cider_d(void* handle, int64_t kept, double log_images, const double* log_frequency, double sigma, int64_t images,
             const int64_t* references, const char* bytes, const int64_t* sizes, double* scores) {
  auto& documents = *static_cast<Documents*>(handle);
  Weights weights{log_images, 2 * power(sigma, 2.0), log_frequency, {}, {}};
  weights.square.assign(documents.most + 1, -1);
  weights.penalty.assign(1024, -1);
  Comparison comparison(documents, weights);
  Texts texts{bytes, sizes};
  Grams grams;
  Bag caption, reference;
  std::vector<int64_t> there;
  const auto unknown = static_cast<uint32_t>(documents.grams.size());  // stands for all n-grams of no document
  if (kept) {
    comparison.frequency = documents.frequency;
    comparison.frequency.push_back(0);
    comparison.times.assign(unknown + 1, 0);
  }
  size_t next = 0;
  for (int64_t image = 0; image < images; ++image) {
    grams.clear();
    there.clear();
    comparison.foreign.clear();
    comparison.count(texts.next(), grams, caption);
    comparison.look_up(grams, there);
    if (kept) {
      for (auto& counts : caption.of)
        for (Count& each : counts) each.gram = there[each.gram] < 0 ? unknown : there[each.gram];
      comparison.begin(caption);
      for (int64_t r = 0; r < references[image]; ++r) comparison.add(documents.kept[next++]);
    } else {
      auto extend = [&] {
        comparison.look_up(grams, there);
        for (size_t i = comparison.frequency.size(); i < there.size(); ++i)
          comparison.frequency.push_back(there[i] < 0 ? 0 : documents.frequency[there[i]]);
        comparison.times.resize(there.size(), 0);
      };
      comparison.frequency.clear();
      extend();
      comparison.begin(caption);
      for (int64_t r = 0; r < references[image]; ++r) {
        comparison.count(texts.next(), grams, reference);
        extend();
        comparison.add(reference);
      }
    }
    scores[image] = comparison.score(references[image]);
  }
}
}
